# HGM3 as published: MoMask with hard token mining and text as a graph. Behind a data config:
#     python train_vq.py   config/toy.py config/hgm3.py --out_dir=out/hgm3
#     python train_mask.py config/toy.py config/hgm3.py --out_dir=out/hgm3  # and --stage=res,
#     python eval_t2m.py   config/toy.py config/hgm3.py --out_dir=out/hgm3  # with --batch_size=64
# Numbers of steps stay those of the data config, whose batches are smaller. For the same epochs add
# --mask_iters=29000 behind hml3d.py; behind kit.py --mask_iters=6000 --cond_scale=2, and
# --batch_size=32 for --stage=res.
# The levels, the teacher's momentum and the share of hard tokens are constants in hgm3.py.
from config.momask import *
text = 'graph'               # of the masked transformer; the residual one reads the sentence
mask_by = 'loss'
batch_size = 256
