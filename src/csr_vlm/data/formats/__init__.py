"""Hold one module per file format.

A module that reads prompts (or the rows of a pair file) defines::

    rows(path) -> Rows      yield (position, row): the row's position in the file, for messages, and a
                            mapping with the file's own fields, or a BadRow
    count(path) -> int      return the number of rows; 0 if counting requires reading everything

A module that exchanges preference pairs with another trainer defines::

    EMBEDS_IMAGES           True if the file itself can hold images
    EMBEDS_ALWAYS           True if it cannot refer to images outside; False if it is absent
    ENDS_EVERY_RESPONSE     True if the trainer ends every response, also where the policy would go on
    write(pairs, out)       write ExportedPair records to the folder ``out``; return the main file
    responses(row)          return (chosen, rejected) of a row; None if the row has another format

To add a format, write such a module and list it in :data:`csr_vlm.data.sources.PROMPT_FORMATS` or
:data:`csr_vlm.data.sources.PAIR_FORMATS`, add its name to ``data.format`` or ``data.pairs_format`` in
:mod:`csr_vlm.config.schema`, and let :func:`csr_vlm.data.sources.detect_format` recognize it. If its
fields have names of their own, add these to :mod:`csr_vlm.data.rows`. Then add a writer to ``WRITERS`` in
``tests/unit/test_formats.py``; ``tests/unit/test_exchange.py`` tests every pair format by itself.
"""
