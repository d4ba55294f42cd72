"""Instruction data from COCO annotations: written by a teacher, checked claim by claim.

`python -m data_tools.instruct COMMAND CONFIG.yaml`. A run is one folder (`run_folder.RunFolder`);
each stage reads the files of the stage before it and writes its own:

    annotations  --index-->     images
    images     --plan-->      requests
    requests     --generate-->  answers
    answers      --verify-->    samples, rejected
    samples      --clean-->     kept, dropped
    kept         --export-->    training files
"""
