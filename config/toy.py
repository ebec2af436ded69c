# The toy set: procedural motion, nothing to download, trained in minutes on two cores (make demo).
data = 'toy'
text_encoder = 'hash'
# tokenizer
vq_width = 128
code_dim = 128
n_codes = 256
n_quantizers = 4
vq_iters = 1000
vq_batch = 64
vq_lr = 2e-3
vq_warmup = 50
w_foot = 2.0
w_heading = 1.0
vq_eval_every = 500
# transformers
latent = 192
n_layers = 4
n_heads = 4
ff = 512
dropout = 0.0
lr = 2e-3
warmup = 100
batch_size = 64
mask_iters = 1600
res_iters = 400
len_iters = 700
eval_every = 500
# decoding: DynMask's (III) on the model's own guess is better on complex motion (RESULTS.md); (I)
# and (II) are level at best and stay off
das_sampling = True
window = 4                   # W of Omega, as measured
msd_decode = 'guess'
temperature = 0.6            # picked on val: .6, .8; times 1 + beta b, which is 1.25 on average
cond_scale = 3.0             # picked on val: 2, 3, 4
res_scale = 1.0              # 5 is worse than no residual layers: LOG.md
