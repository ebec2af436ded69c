# MoMask (Guo et al. 2024) as published; behind a data config:
#     python train_vq.py   config/toy.py config/momask.py --out_dir=out/momask
#     python train_mask.py config/toy.py config/momask.py --out_dir=out/momask  # also --stage=res
#     python eval_t2m.py   config/toy.py config/momask.py --out_dir=out/momask
# Sizes and numbers of steps stay those of the data config. Behind hml3d.py and kit.py, whose steps
# are counted in batches of MoMask's code, add --vq_batch=256; behind kit.py also --cond_scale=2.
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
spectral_attn = False
mask_by = 'random'
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
anneal = 0.0
res_temperature = 1.0
res_layers = -1
das_sampling = False
