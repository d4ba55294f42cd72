"""Building instruction data from COCO-format annotations."""
