"""From text to samples.

    sources, files      what a source's name means; the files of a folder, their forms, what is left out
    readers, arrow      files of records -> records, from any place on
    texts               files of text -> records, or pieces of one, likewise
    records             what of a record is its text or conversation, and what is refused
    chat                a record's `messages` -> text by the chat template, and the spans that are learned
    tokenizer           texts -> ids, and for conversations which of them are learned
    shards, prepared    token ids on disk, verified as they are read
    prepare, command    sources -> a prepared folder, in parallel and resumable
    packing             tokens -> samples of a fixed length
    order               which sample comes when: mixtures and permutations as arithmetic on the index
    streaming           samples packed on the fly, for text that is too large to tokenise first

A sample's labels say what is learned: IGNORE_INDEX at the border of documents, and in conversations on everything but
the assistant's answers. A source of conversations needs no setting: its records hold `messages` in place of `text`.
"""
