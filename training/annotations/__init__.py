"""What people have annotated: image-level labels and masks, from the files that their tools write.

    from multisa.training.annotations.registry import read_annotations

    annotations = read_annotations(Path("export.json"), class_names)   # background first
    annotations.names                   # of the images, as the file names them
    annotations.labels("a.jpg")         # (1, 5): ids of the foreground classes that the image shows, ascending
    annotations.mask("a.jpg")           # uint8 [H, W] of class ids, 255 = ignored; None where it has no mask
    annotations.mask("a.jpg", (H, W))   # the same; ImageError if it is not as large as the upright image
    annotations.match(relatives, root)  # which image of a folder each name means, and the names of no image
    annotations.notes                   # what is not used, and why: {reason: names}

| what | read from |
|---|---|
| COCO | a JSON file of instances (`images`, `annotations`, `categories`), original ids or ours |
| CVAT | `annotations.xml` of "CVAT for images 1.1", or the zip that holds it |
| Label Studio | a JSON export of tasks: choices, brush masks, polygons |
| masks | a folder of palette or grey PNGs of class ids, or the output folder of `multisa label` or `segment` |

Classes are found by name, as in label files. What belongs to no class is left out and noted. Beside the classes, the
names `background` and `ignore` are known: they draw 0 and 255. Masks are drawn when they are read. Names of images are
only compared with the names of files that exist, so none of them leads out of a folder.
"""
