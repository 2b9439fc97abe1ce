# SPIN: self-play of the policy against its latest self on the toy data.
# 2 CPU cores: 1 min. H200 (results/toy_preference, 3 seeds): quality 0.39 -> 0.53 +- 0.02
# python preference.py config/toy_spin.py      after: python train.py config/toy_start.py
out_dir = 'out/toy_spin'
method, init_from = 'spin', 'out/toy_start'
source = 'toy'
beta = 2.0
iterations, groups_per_iteration, groups_per_step = 60, 256, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 3e-4, 3e-5, 20, 0.0
eval_interval = 40
