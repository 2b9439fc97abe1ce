# PPO with a renormalised reward on the toy data: each prompt's 8 answers have mean reward 0 and variance 1.
# 2 CPU cores: 2.3 min. H200 (results/toy_preference, 3 seeds): true quality 0.39 -> 0.68 +- 0.03
# python preference.py config/toy_ppo.py      after: python train.py config/toy_start.py and
# python preference.py config/toy_reward.py
out_dir = 'out/toy_ppo'
method, init_from, reward_model = 'ppo', 'out/toy_start', 'out/toy_reward'
source = 'toy'
beta = 0.15
iterations, groups_per_iteration, answers_per_prompt, inner_epochs, groups_per_step = 80, 32, 8, 2, 32
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 1e-4, 1e-4, 10, 0.0
eval_interval = 20
