# The teacher of the toy distillation: more steps than toy_start, only answers with ten times the score of another.
# 2 CPU cores, 2 min: val_ce 0.231 on its own data, true quality of its samples 0.77 (one seed)
# python train.py config/toy_teacher.py
out_dir = 'out/toy_teacher'
source, dataset, min_score_ratio = 'toy', 'toy_best', 10.0
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
