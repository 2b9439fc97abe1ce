out_dir = 'out/toy_reward'
method, init_from = 'reward', 'out/toy_start'
source = 'toy'
inner_epochs, groups_per_step = 2, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 1e-3, 1e-4, 50, 0.0
eval_interval = 100
