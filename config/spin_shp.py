# SPIN on stanfordnlp/SHP against the two latest selves.
# torchrun --nproc_per_node=8 preference.py config/spin_shp.py      after: train.py config/t0_shp.py
# Not measured yet on this data and hardware; on a Reddit stand-in: results/README.md.
out_dir = 'out/spin_shp'
method, init_from, opponents = 'spin', 'out/t0_shp', 2
beta = 1.0
iterations, groups_per_iteration, groups_per_step = 8, 8192, 256
max_new_tokens = 64
learning_rate, min_lr, warmup_iters, weight_decay = 1e-5, 1e-6, 20, 0.0
eval_interval = 32
