out_dir = 'out/toy_ppo'
method, init_from, reward_model = 'ppo', 'out/toy_start', 'out/toy_reward'
source = 'toy'
beta = 0.05
iterations, groups_per_iteration, answers_per_prompt, inner_epochs, groups_per_step = 100, 16, 8, 2, 16
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 3e-4, 3e-5, 10, 0.0
eval_interval = 40
