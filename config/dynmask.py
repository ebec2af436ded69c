# DynMask's three switches, behind another config file, which says all the rest:
#     python train_mask.py config/toy.py config/dynmask.py --out_dir=out/dynmask --vq=out/toy/vq.pt
spectral_attn = True         # (I)  motion-aware attention, Eqs 11-14
mask_by = 'msd'              # (II) content-focused masks, Eqs 9-10
das_sampling = True          # (III) complexity-aware decoding, Eqs 15-21
