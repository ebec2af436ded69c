# KIT-ML: trains DynMask as published, as config/hml3d.py does, which has the remarks.
# First: python prepare_data.py kit --src=KIT-ML
from config.hml3d import *
data = 'kit'
# the same epochs: KIT-ML has a fifth of HumanML3D's clips (4,888 of 23,384)
vq_iters = 73000
mask_iters = 49000           # with half the batch
res_iters = 49000
len_iters = 10000
batch_size = 32
cond_scale = 2.0
