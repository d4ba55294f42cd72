"""Instruction data from COCO's annotations: asked of a teacher, checked by claims, with receipts.

`python -m data_tools.instruct COMMAND CONFIG.yaml`. A run is one folder (`folder.RunFolder`); each
stage reads the files of the one before and writes its own:

    annotations  --index-->     images
    images     --plan-->      requests
    requests     --generate-->  answers
    answers      --verify-->    samples, rejected
    samples      --clean-->     kept, set aside
    kept         --export-->    training files
"""
