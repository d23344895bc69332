//! Any bytes as a layer index on disk, with the magic number and the checksum made right, and the data space on one device, cut into several,
//! or on devices of any sizes. What is written reads
//! back whole with a reader of its own, all extents inside the devices; nothing else is written.

#![no_main]

use lazuli::layer::erofs::{self, Addressing, Device};
use lazuli::layer::{Digest, LayerIndex};
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/erofs/reader.rs"]
#[allow(dead_code)]
mod reader;

#[path = "../sealed.rs"]
#[allow(dead_code)]
mod sealed;

/// Where devices begin in a data space, in bytes.
const BLOCK: u64 = 512;

fuzz_target!(|input: (u8, [u32; 3], &[u8])| {
    let (count, sizes, bytes) = input;
    let sizes = &sizes[..usize::from(count) % (sizes.len() + 1)];
    let Ok(index) = LayerIndex::decode(&sealed::index(bytes)) else {
        return;
    };
    let digest = Digest::of(bytes);
    let device = |size: &u32| Device {
        tag: digest,
        size: u64::from(*size),
    };
    let whole = vec![Device {
        tag: digest,
        size: index.data_size(),
    }];
    // The data space in parts, as the layers of a chain are: each begins at a block.
    let mut parts = Vec::new();
    let mut left = index.data_size();
    for size in sizes {
        let part = (u64::from(*size).next_multiple_of(BLOCK)).min(left);
        parts.push(Device {
            tag: digest,
            size: part,
        });
        left -= part;
    }
    parts.push(Device {
        tag: digest,
        size: left,
    });
    for devices in [whole, parts, sizes.iter().map(device).collect()] {
        for addressing in [Addressing::Unified, Addressing::Chunks] {
            let Ok(image) = erofs::write(&index, &devices, addressing) else {
                continue;
            };
            let read = reader::read(&image.bytes).expect("what is written can be read");
            assert_eq!(read.inodes, image.inodes);
            assert_eq!(erofs::write(&index, &devices, addressing).as_ref(), Ok(&image));
        }
    }
});
