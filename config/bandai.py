# Bandai-Namco Research motion capture, 2,900 clips: sizes for a laptop.
# First: python prepare_data.py bandai --src=...
data = 'bandai'
text_encoder = 'hash'        # 26 contents x 22 styles: hashed words are enough
# tokenizer
vq_width = 256
code_dim = 256
n_codes = 512
n_quantizers = 6
vq_iters = 6000
vq_batch = 48                # smaller, more steps: LOG.md
vq_reset_below = 0.4
vq_lr = 1e-3
vq_warmup = 100
w_rotation = 1.0             # halves the tokenizer's FID: LOG.md
w_foot = 2.5                 # halves the sliding of feet: LOG.md
w_heading = 1.0
vq_eval_every = 500
# transformers
latent = 256
n_layers = 4
n_heads = 4
ff = 768
lr = 2e-3
warmup = 200
batch_size = 64
len_iters = 1000
rotary = True                # these two: the context is used five times as soon, LOG.md
neighbours = 2
dropout = 0.05               # 0.2 was level in the first 1,000 steps
mask_iters = 4000
res_iters = 3000
eval_every = 500
# decoding: DynMask's (III) on the model's own guess, at the same mean temperature, is better on
# complex motion (RESULTS.md); (I) and (II) are level at best and stay off
das_sampling = True
window = 4                   # W of Omega, as measured
msd_decode = 'guess'
temperature = 0.8            # times 1 + beta b, which is 1.25 on average
examples = 'config/bandai_prompts.txt'   # of the page
cond_scale = 2.0
res_scale = 1.0              # 5 is worse than no residual layers: LOG.md
res_temperature = 1.6        # residual layers are overconfident: LOG.md
