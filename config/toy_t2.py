# T_2 on the embedded toy data, a first run for any CPU: 2 layers x 128 channels, bytes.
# 2 CPU cores: 2 min, 540 MiB. results/toy_taylor (3 seeds): val_ce 0.297 +- 0.002, val_ce_link 0.264 +- 0.002
# python train.py config/toy_t2.py
out_dir = 'out/toy_t2'
source = 'toy'
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
taylor_order = 2
