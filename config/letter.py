# Everything where we left the letter of the papers, taken back; behind another config file:
#     python train_vq.py   config/toy.py config/letter.py --out_dir=out/letter
#     python train_mask.py config/toy.py config/letter.py --out_dir=out/letter
# is DynMask as published, and with --spectral_attn=False --mask_by=random MoMask. The table in
# RESULTS.md says what each of these lines changes.
spectral_attn = True
mask_by = 'msd'
das_sampling = True
text = 'sentence'
optimizer = 'adamw'
rotary = False
neighbours = 0
token_init = 'random'
msd_embed = 'learned'
msd_attn = 'clean'
msd_gap = 'zero'
omega = 'flatness'
fusion = 'zscore'
cfs_share = 1.0
cfs_ramp = 0.0
cfs_noise = 0.0
grad_clip = 1e9
res_cond_drop = 0.2
res_draw = 'release'
cond_scale = 4.0
res_scale = 5.0
w_foot = 0.0
w_heading = 0.0
w_rotation = 0.0
