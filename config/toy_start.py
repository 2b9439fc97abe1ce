# The start of all toy preference runs: cross-entropy, stopped while it still has much to learn.
# python train.py config/toy_start.py
out_dir = 'out/toy_start'
source = 'toy'
max_iters = 400
