# T_1 on stanfordnlp/SHP with the source's model: 1 layer, 8 heads, 1024 channels (--n_embd=64 for its small one).
# torchrun --nproc_per_node=8 train.py config/t1_shp.py      after: python prepare_shp.py
# Not run on SHP yet. Stand-in, other schedule (results/reddit_taylor, 1 seed): lowest val_ce 4.69, 64 channels 5.04
out_dir = 'out/t1_shp'
taylor_order = 1
n_layer, n_head, n_embd = 1, 8, 1024
cut, block_size = 'examples', 128
batch_size = 256
epochs = 4
eval_interval = 500
learning_rate, min_lr, warmup_iters = 1e-3, 1e-4, 200
weight_decay, grad_clip = 0.0, 10.0
