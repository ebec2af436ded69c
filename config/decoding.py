# Which networks to use and how to decode: settings that sample.py, eval_t2m.py, eval_edit.py and
# app.py share.
init_from = 'checkpoint'     # 'checkpoint', our own from out_dir | 'momask', the official weights
mask_file = 'mask.pt'        # which masked transformer of out_dir
momask_root = ''             # folder of the official weights
momask_mask = ''             # names in it; '' is the only folder t2m_* or tres_*
momask_res = ''
text_encoder = 'clip'        # of the official weights: 'clip' | 'hash'; our checkpoints know theirs
# decoding
steps = 10                   # steps in which the base tokens are filled in
cond_scale = 4.0             # guidance of the base tokens (KIT-ML 2)
res_scale = 5.0              # guidance of the residual tokens
top_share = 0.1              # tokens are sampled from this share of the codes
temperature = 1.0            # T_global of Eq 18
anneal = 0.0                 # (III): T_global falls by this share, in equal steps
res_temperature = 1.0
res_layers = -1              # residual layers to add; -1 is all
das_sampling = False         # (III) of Table 4: complexity-aware decoding, 3.6
lambda_D = 0.5               # Eq 15
beta = 0.5                   # Eq 18
sigma_max = 0.5              # Eq 19
msd_decode = 'kept'          # MSD of the 'kept' tokens | of the model's full 'guess'
