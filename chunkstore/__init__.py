"""The bytes: blocks, object stores, and the images that cache and stage them on local disks."""
