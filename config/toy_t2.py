# T_2 on the embedded toy data, a first run for any CPU: 2 layers x 128 channels, bytes.
# 2 CPU cores, 2 min (36k tokens/s, 510 MiB): val_ce 0.302 +- 0.000, val_ce_link 0.274 +- 0.008 (n=3 seeds;
# seed 0 since the head rounds as it does now: 0.295 and 0.265)
# python train.py config/toy_t2.py
out_dir = 'out/toy_t2'
source = 'toy'
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
taylor_order = 2
