"""From text to samples: `sources` reads documents, `packing` turns them into token files and fixed-length samples."""
