# A reward model for the toy data: Plackett-Luce likelihood of its rankings, plus the best answers' cross-entropy.
# 2 CPU cores: 2.1 min. H200 (results/toy_preference, 3 seeds): rank_accuracy 0.907 +- 0.008
# python preference.py config/toy_reward.py      after: python train.py config/toy_start.py
out_dir = 'out/toy_reward'
method, init_from = 'reward', 'out/toy_start'
source = 'toy'
reward_read, sft_weight = 'sum', 0.3
inner_epochs, groups_per_step = 2, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 2e-3, 1e-4, 50, 1.0
eval_interval = 100
