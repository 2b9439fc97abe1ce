# The start of all toy preference runs: cross-entropy, stopped while it still has much to learn.
# python train.py config/toy_start.py
out_dir = 'out/toy_start'
source = 'toy'
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
max_iters = 350
