# PPO on stanfordnlp/SHP with a renormalised reward: each prompt's 8 answers have mean reward 0 and variance 1.
# torchrun --nproc_per_node=8 preference.py config/ppo_shp.py      after: train.py config/t0_shp.py and
# preference.py config/reward_shp.py
# Not measured yet on this data and hardware; on a Reddit stand-in: results/README.md.
out_dir = 'out/ppo_shp'
method, init_from, reward_model = 'ppo', 'out/t0_shp', 'out/reward_shp'
beta = 0.05
iterations, groups_per_iteration, answers_per_prompt, inner_epochs, groups_per_step = 500, 64, 8, 2, 64
max_new_tokens = 64
learning_rate, min_lr, warmup_iters, weight_decay = 1e-5, 1e-5, 10, 0.0
eval_interval = 50
