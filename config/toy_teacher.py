# The teacher of the toy distillation: longer, on the best answers only (ten times the score of a worse one).
# python train.py config/toy_teacher.py
out_dir = 'out/toy_teacher'
source = 'toy'
dataset = 'toy_best'
min_score_ratio = 10.0
max_iters = 2000
