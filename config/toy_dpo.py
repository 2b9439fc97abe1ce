out_dir = 'out/toy_dpo'
method, init_from = 'dpo', 'out/toy_start'
source = 'toy'
beta = 0.1
inner_epochs, groups_per_step = 1, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 1e-3, 1e-4, 20, 0.0
eval_interval = 100
