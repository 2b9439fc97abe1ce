# Plackett-Luce DPO over up to 4 ranked answers of stanfordnlp/SHP.
# torchrun --nproc_per_node=8 preference.py config/dpo_shp.py      after: train.py config/t0_shp.py
# Not measured yet on this data and hardware; on a Reddit stand-in: results/README.md.
out_dir = 'out/dpo_shp'
method, init_from = 'dpo', 'out/t0_shp'
beta, max_answers = 0.1, 4
iterations, groups_per_iteration, groups_per_step = 8, 16384, 256
max_new_tokens = 64
learning_rate, min_lr, warmup_iters, weight_decay = 1e-5, 1e-6, 50, 0.0
eval_interval = 64
