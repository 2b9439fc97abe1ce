out_dir = 'out/toy_distill'
method, init_from = 'distill', 'out/toy_start'
source = 'toy'
teacher, beta = 'out/toy_teacher', 0.1
iterations, groups_per_iteration, inner_epochs, groups_per_step = 3, 1024, 1, 32
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 3e-4, 3e-5, 10, 0.0
eval_interval = 32
