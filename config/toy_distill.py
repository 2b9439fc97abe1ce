# Self-play distillation on the toy data: data > teacher > self.
# 2 CPU cores: 1.4 min. H200 (results/toy_preference, 3 seeds): quality 0.39 -> 0.53 +- 0.00
# python preference.py config/toy_distill.py      after: python train.py config/toy_start.py,
# python train.py config/toy_teacher.py and python preference.py config/toy_reward.py (for metrics only)
out_dir = 'out/toy_distill'
method, init_from, teacher, reward_model = 'distill', 'out/toy_start', 'out/toy_teacher', 'out/toy_reward'
source = 'toy'
beta = 2.0
iterations, groups_per_iteration, groups_per_step = 60, 256, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 3e-4, 3e-5, 20, 0.0
eval_interval = 40
