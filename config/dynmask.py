# DynMask (arXiv 2603.29655) as published, on MoMask; behind a data config:
#     python train_vq.py   config/toy.py config/dynmask.py --out_dir=out/dynmask
#     python train_mask.py config/toy.py config/dynmask.py --out_dir=out/dynmask  # also --stage=res
#     python eval_t2m.py   config/toy.py config/dynmask.py --out_dir=out/dynmask
# Sizes and numbers of steps stay those of the data config. KIT-ML: add --cond_scale=2.
# tokenizer
quantize_dropout = 0.2
vq_reset_below = 1.0
vq_batch = 512               # the paper's; its code has 256
vq_lr = 2e-4
vq_warmup = 2000
w_position = 0.5
w_commit = 0.02
w_rotation = 0.0
w_foot = 0.0
w_heading = 0.0
# transformers
text = 'sentence'
spectral_attn = True         # I
mask_by = 'msd'              # II
window = 8                   # the paper gives no value for this, alpha0, lambda, r_exp and below
alpha0 = 0.3                 # for lambda_D, beta, sigma_max
fusion = 'zscore'
msd_embed = 'learned'
msd_gap = 'zero'
omega = 'flatness'
msd_attn = 'clean'
cfs_lambda = 0.3
cfs_noise = 0.0
cfs_share = 1.0
cfs_ramp = 0.0
r_exp = 0
rotary = False
neighbours = 0
token_init = 'random'
dropout = 0.2
optimizer = 'adamw'
lr = 2e-4
warmup = 2000
grad_clip = 1e9              # none
cond_drop = 0.1              # MoMask's code has 0.2 for the residual transformer
# decoding
steps = 10
cond_scale = 4.0
res_scale = 5.0
top_share = 0.1
temperature = 1.0
anneal = 0.5                 # T_global is "step-dependent" (Eq 18); the schedule is our guess
res_temperature = 1.0
res_layers = -1
das_sampling = True          # III
lambda_D = 0.5
beta = 0.5
sigma_max = 0.5
msd_decode = 'guess'         # Algorithm 2, line 3: "from the current decoded sequence"
