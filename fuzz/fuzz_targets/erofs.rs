//! Any bytes as a layer index on disk, with the magic number and the checksum made right, and any sizes of devices. What is written reads
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
    for devices in [whole, sizes.iter().map(device).collect()] {
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
