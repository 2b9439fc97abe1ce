# SPIN against three past selves on the toy data: data above every self (--league=ordered: later selves above earlier).
# 2 CPU cores: 2.4 min, quality 0.38 -> 0.52 (one seed). H200 (results/toy_preference, 3 seeds): ordered 0.33 +- 0.16
# python preference.py config/toy_spin_league.py      after: python train.py config/toy_start.py
out_dir = 'out/toy_spin_league'
method, init_from, opponents = 'spin', 'out/toy_start', 3
source = 'toy'
beta = 2.0
iterations, groups_per_iteration, groups_per_step = 60, 256, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 3e-4, 3e-5, 20, 0.0
eval_interval = 40
