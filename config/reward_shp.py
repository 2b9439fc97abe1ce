# A reward model for stanfordnlp/SHP: Plackett-Luce likelihood of rankings of up to 4 answers.
# torchrun --nproc_per_node=8 preference.py config/reward_shp.py      after: train.py config/t0_shp.py
# Not measured yet on this data and hardware; on a Reddit stand-in: results/README.md.
out_dir = 'out/reward_shp'
method, init_from = 'reward', 'out/t0_shp'
reward_read, sft_weight, max_answers = 'sum', 0.3, 4
iterations, groups_per_iteration, groups_per_step = 8, 16384, 256
max_new_tokens = 64
learning_rate, min_lr, warmup_iters, weight_decay = 1e-4, 1e-5, 50, 0.1
eval_interval = 64
