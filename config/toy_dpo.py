# Plackett-Luce DPO over rankings of 2 to 7 answers, plus the best answers' cross-entropy, on the toy data.
# 2 CPU cores: 2.5 min. H200 (results/toy_preference, 3 seeds): rank_accuracy 0.916 +- 0.001, quality 0.48 +- 0.02
# python preference.py config/toy_dpo.py      after: python train.py config/toy_start.py
out_dir = 'out/toy_dpo'
method, init_from = 'dpo', 'out/toy_start'
source = 'toy'
beta, sft_weight = 1.0, 1.0
inner_epochs, groups_per_step = 2, 64
max_new_tokens = 38
learning_rate, min_lr, warmup_iters, weight_decay = 5e-4, 3e-5, 20, 0.0
eval_interval = 100
