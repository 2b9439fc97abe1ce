# The start of all toy preference runs: cross-entropy, stopped early.
# 2 CPU cores, 45 s: val_ce 0.246, true quality of its samples 0.37 (results/toy_taylor/quality.py, one seed)
# python train.py config/toy_start.py
out_dir = 'out/toy_start'
source = 'toy'
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
max_iters = 350
