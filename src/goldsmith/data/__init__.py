"""From files to gold: rows are read, checked, rendered to token ids with weights, and laid out as packs.

The stages, in order: `config` (what a recipe says of its rows), `rows` and `hub` (files and data sets to rows), `formats` (rows
to conversations), `sources` (both of a source), `tokenizer` and `rendering` (conversations to token ids with weights), `loader`
(rows in, and their report), `dataset` and `spool` (what is kept of them, in memory or on the
disk), `mixture`, `packing` and `order`
(which examples a step holds, its cut into micro-batches, the pack). Every row is used, rejected with a reason, or over a limit.
"""
