# The teacher of the toy distillation: longer, on the best answers only (ten times the score of a worse one).
# python train.py config/toy_teacher.py
out_dir = 'out/toy_teacher'
source, dataset, min_score_ratio = 'toy', 'toy_best', 10.0
cut, block_size, batch_size = 'examples', 80, 64
learning_rate, min_lr = 2e-3, 2e-4
