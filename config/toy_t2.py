# T_2 on the embedded toy data, a first run for any CPU: 2 layers x 128 channels, bytes.
# python train.py config/toy_t2.py
out_dir = 'out/toy_t2'
source = 'toy'
taylor_order = 2
