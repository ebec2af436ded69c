# Whose networks, and how to decode: the settings that sample.py, eval_t2m.py, eval_edit.py and
# app.py share.
init_from = 'checkpoint'     # our own, from out_dir | 'momask': the official, from momask_root
mask_file = 'mask.pt'        # which masked transformer of out_dir
momask_root = ''
momask_data = 't2m'          # 't2m' | 'kit'
momask_mask = ''             # checkpoint names there; '' is the only folder t2m_* / tres_*
momask_res = ''
momask_text = 'clip'         # text encoder for the official weights; their own is 'clip' | 'hash'
# decoding
steps = 10                   # rounds in which base tokens are filled in
cond_scale = 4.0             # guidance of the base tokens (KIT 2)
res_scale = 5.0              # guidance of the residual tokens
top_share = 0.1              # base tokens are drawn from this share of the codes
temperature = 1.0            # T_global of Eq 18
anneal = 0.0                 # T_global falls by this share over the steps
res_temperature = 1.0
res_layers = -1              # residual layers to add; -1 is all
das_sampling = False         # (III) of Table 4, 3.6: complexity-aware decoding
lambda_D = 0.5               # Eq 15
beta = 0.5                   # Eq 18
sigma_max = 0.5              # Eq 19
msd_decode = 'kept'          # MSD of the 'kept' tokens | of the full 'guess'
motion_steps = 2             # HGM3 (--text=graph): steps that hear of the motion node alone
action_steps = 5             # and up to this one of actions too
