# HumanML3D: trains DynMask as published, at the sizes and on the schedule of MoMask's code.
# First: python prepare_data.py hml3d --src=HumanML3D
# Never trained at this size by this project. Other papers: config/momask.py or config/hgm3.py
# behind this file. Our own recipe of toy and bandai, without DynMask's parts: --text=clauses
# --token_init=codebook --optimizer=muon --grad_clip=1 --spectral_attn=False --mask_by=random
# --das_sampling=False.
from config.dynmask import *
data = 'hml3d'
text_encoder = 'clip'
# schedule. MoMask's code: tokenizer 350,000 steps, rate x 0.1 at 150,000 and 250,000; transformers
# 190,000 steps, rate x 0.1 at 50,000. Here the rate is a cosine to a tenth: over 350,000 steps it
# sums to 1.2 times theirs, over 116,000 steps to exactly theirs.
vq_iters = 350000
vq_batch = 256               # as in MoMask's code; its paper says 512
mask_iters = 116000
res_iters = 116000
len_iters = 20000
batch_size = 64
n_layers = 8                 # as in the official weights; the paper says 6
# the evaluator at its official size, where the official one is not used
ev_movement = 512
ev_code = 512
ev_motion_hidden = 1024
ev_text_hidden = 512
ev_ae_steps = 10000
ev_steps = 30000
