"""Questions and answers that follow from boxes and captions, without a model.

    facts.py         what is certain of an image: presence, numbers, halves, left and right
    phrases.py       filling the patterns of `wording/questions.json` with names in correct grammar
    families.py      captions, description, existence, counting, halves, relation: single questions
    existence.py     which present and absent categories are asked about
    conversation.py  several of them in one conversation
    reasoning.py     questions in two steps, and descriptions in detail
    datasets.py      the contents of `build_coco`'s files, checked by the verifier

`data_tools.build_coco` and the teacher `rules` of `data_tools.instruct` write these sentences.
"""
