# DynMask (arXiv 2603.29655) as published: MoMask with its three parts. Behind a data config:
#     python train_vq.py   config/toy.py config/dynmask.py --out_dir=out/dynmask
#     python train_mask.py config/toy.py config/dynmask.py --out_dir=out/dynmask  # also --stage=res
#     python eval_t2m.py   config/toy.py config/dynmask.py --out_dir=out/dynmask
# The paper gives no values for window, alpha0, cfs_lambda, r_exp, lambda_D, beta, sigma_max and
# the schedule of T_global: they are our guesses.
from config.momask import *
# I, motion-aware attention: Eqs 4-8, 11-14
spectral_attn = True
window = 8
alpha0 = 0.3
fusion = 'zscore'
msd_embed = 'learned'
msd_gap = 'zero'
omega = 'flatness'
msd_attn = 'clean'           # Algorithm 1
# II, content-focused masks: Eqs 9-10
mask_by = 'msd'
cfs_lambda = 0.3
cfs_noise = 0.0
cfs_share = 1.0
cfs_ramp = 0.0
r_exp = 0
# III, complexity-aware decoding: Eqs 15-21
das_sampling = True
msd_decode = 'guess'         # Algorithm 2, line 3: MSD "from the current decoded sequence"
anneal = 0.5                 # Eq 18: T_global is "step-dependent"
lambda_D = 0.5
beta = 0.5
sigma_max = 0.5
