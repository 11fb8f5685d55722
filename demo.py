SFT = {"out": "runs/demo/sft"}
