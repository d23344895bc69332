//! Whether this kernel can serve the image face: tried, once, with a mount of a tiny layer that goes every way a real one goes.
//!
//! A version number would not do: EROFS may be left out of a kernel, be a module that is not there, mount block devices only, or refuse
//! the file system on which the root directory lies.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::calls::CallError;
use super::mounts::{Mounts, OPTIONS};
use super::places::{PROBE, make_mount_point};
use crate::fetch::{FetchError, LayerData};
use crate::fs::{FsError, Session};
use crate::layer::erofs::{self, Addressing};
use crate::layer::index::{Dirent, mode};
use crate::layer::{Access, BlobIndex, Codec, Digest, IndexParts, Inode, LayerError, LayerIndex, ROOT_INO};
use crate::sys::SysError;

/// Slot of the probe's layer. Slots are given out from 1 upwards.
const SLOT: u32 = u32::MAX - 1;
/// The one file of the layer, and what is in it, again and again.
const NAME: &[u8] = b"probe";
const CONTENT: &[u8] = b"Does the kernel show what it was given?";
/// Bytes of the layer's data space: a few pages, since a file of one page is not read like others.
const DATA_SIZE: usize = 3 * 4096;
/// Bytes of the file. It ends within a page.
const FILE_SIZE: usize = DATA_SIZE - 100;

/// Releases of Linux from which on the kernel may join reads of EROFS from files: their first two numbers, and the third from which on
/// they have the fix. Before (upstream "erofs_onlinefolio_split() after bio_add_folio()"), a read for which a request has too little room
/// left its pages locked for ever. Of other releases all after the last of these have it.
const JOINED_READS: [(u32, u32, u32); 3] = [(6, 12, 29), (6, 14, 7), (6, 15, 0)];

/// How images for the kernel with this release should say where bytes are.
pub(super) fn addressing(release: &str) -> Addressing {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| digits.parse::<u32>().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let (major, minor, patch) = (next(), next(), next());
    let [.., last] = JOINED_READS;
    let listed = JOINED_READS
        .iter()
        .any(|&(a, b, c)| (major, minor) == (a, b) && patch >= c);
    if listed || (major, minor, patch) >= last {
        Addressing::Chunks
    } else {
        Addressing::Unified
    }
}

/// What the kernel can do.
#[derive(Debug)]
pub(super) struct Probed {
    /// Metadata have to come through FUSE.
    pub(super) metadata_through_fuse: bool,
    /// Why files of the local disk cannot be devices, if they cannot.
    pub(super) no_files: Option<String>,
}

/// Why the image face cannot serve, as a person understands it.
pub(super) fn probe(session: &Session, mounts: &Mounts, addressing: Addressing) -> Result<Probed, String> {
    let layer = Probe::new().map_err(|error| error.to_string())?;
    let device = erofs::Device {
        tag: layer.digest,
        size: DATA_SIZE as u64,
    };
    let image = erofs::write(&layer.index, &[device], addressing).map_err(|error| error.to_string())?;
    let path = |what: &str| mounts.places.dir().join(format!("{PROBE}{what}"));
    let (metadata, data) = (path("meta"), path("data"));
    let files = [(&metadata, &image.bytes[..]), (&data, &layer.data[..])];
    let probed = files
        .iter()
        .try_for_each(|(path, bytes)| mounts.places.write(path, &[bytes], false))
        .and_then(|()| session.attach(SLOT, Arc::new(layer)))
        .map_err(|error| error.to_string())
        .and_then(|()| ways(session, mounts, &metadata, &data));
    session.detach(SLOT);
    session.detach_metadata(SLOT);
    for path in [&metadata, &data] {
        mounts.places.remove(path);
    }
    probed
}

/// Tries the ways in which an image can be mounted.
fn ways(session: &Session, mounts: &Mounts, metadata: &Path, data: &Path) -> Result<Probed, String> {
    let device = session.data_path(SLOT);
    let mut source = metadata.to_owned();
    let mut result = show(mounts, &source, &device);
    let metadata_through_fuse = result.as_ref().is_err_and(|error| error.errno() == Some(libc::ENOTBLK));
    if metadata_through_fuse {
        let attach = || {
            let file = File::open(metadata).map_err(|error| error.to_string())?;
            session
                .attach_metadata(SLOT, file)
                .map_err(|error: FsError| error.to_string())
        };
        attach()?;
        source = session.metadata_path(SLOT);
        result = show(mounts, &source, &device);
    }
    result.map_err(|error| explain(&error))?;
    // A device on a stacked file system would be taken, and deeper stacks made of it than the kernel means to allow; and a mount that
    // needs this process for its names is not worth being called a file.
    let no_files = match metadata_through_fuse {
        true => Some("metadata come through FUSE".to_owned()),
        false => show(mounts, &source, data).err().map(|error| error.to_string()),
    };
    Ok(Probed {
        metadata_through_fuse,
        no_files,
    })
}

/// Mounts the image, reads the file in it, and unmounts it.
fn show(mounts: &Mounts, source: &Path, device: &Path) -> Result<(), CallError> {
    let path = mounts.places.dir().join(format!("{PROBE}mount"));
    let fail = |error: io::Error| SysError::new("read", &path, error);
    make_mount_point(&path).map_err(|error| fail(io::Error::other(error)))?;
    mounts.mount_at(&path, source.to_owned(), vec![device.to_owned()], OPTIONS)?;
    let file = path.join("probe");
    let read = mounts.calls.run(move || {
        let read = std::fs::read(&file);
        read.map_err(|error| SysError::new("read", &file, error))
    });
    let unmounted = mounts.unmount(path.clone());
    if read? != content()[..FILE_SIZE] {
        let error = io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel shows other bytes than it was given",
        );
        return Err(fail(error).into());
    }
    unmounted
}

fn explain(error: &CallError) -> String {
    let known = match error.errno() {
        Some(libc::ENODEV) => "this kernel has no EROFS (CONFIG_EROFS_FS)",
        Some(libc::ENOTBLK) => {
            "this kernel mounts EROFS from block devices only; it takes Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE"
        }
        Some(libc::EPERM) => "mounting EROFS takes CAP_SYS_ADMIN in the initial user namespace",
        Some(libc::ENOSYS) => {
            "this kernel has no fsopen; it takes Linux 5.2 or later, or a sandbox that lets it through"
        }
        _ => return error.to_string(),
    };
    format!("{known}: {error}")
}

/// What is in the layer's data space.
fn content() -> Vec<u8> {
    CONTENT.iter().copied().cycle().take(DATA_SIZE).collect()
}

/// A layer of one file, in memory.
struct Probe {
    digest: Digest,
    index: Arc<LayerIndex>,
    bytes_of: BlobIndex,
    data: Bytes,
}

impl Probe {
    fn new() -> Result<Self, LayerError> {
        let data = content();
        let root = Inode {
            mode: mode::DIR | 0o755,
            nlink: 2,
            parent: ROOT_INO,
            count: 1,
            ..Inode::default()
        };
        let file = Inode {
            mode: mode::REG | 0o400,
            nlink: 1,
            size: FILE_SIZE as u64,
            ..Inode::default()
        };
        let name = Dirent {
            name: 0,
            name_len: NAME.len() as u32,
            ino: ROOT_INO + 1,
        };
        let index = LayerIndex::new(IndexParts {
            access: Access::Stream,
            codec: Codec::None,
            data_size: DATA_SIZE as u64,
            blob_size: DATA_SIZE as u64,
            inodes: vec![root, file],
            dirents: vec![name],
            xattrs: Vec::new(),
            chunks: Vec::new(),
            checkpoints: Vec::new(),
            verify: crate::layer::Verify::Content,
            strings: NAME.to_vec(),
        })?;
        Ok(Probe {
            digest: Digest::of(CONTENT),
            bytes_of: index.blob(),
            index: Arc::new(index),
            data: data.into(),
        })
    }

    fn bytes(&self, offset: u64, len: usize) -> Bytes {
        let at = usize::try_from(offset).unwrap_or(usize::MAX).min(self.data.len());
        let end = at.saturating_add(len).min(self.data.len());
        self.data.slice(at..end)
    }
}

impl LayerData for Probe {
    fn digest(&self) -> &Digest {
        &self.digest
    }

    fn index(&self) -> &BlobIndex {
        &self.bytes_of
    }

    fn names(&self) -> Result<Arc<LayerIndex>, FetchError> {
        Ok(Arc::clone(&self.index))
    }

    fn read_ready(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        let bytes = self.bytes(offset, buf.len());
        let (there, behind) = buf.split_at_mut(bytes.len());
        there.copy_from_slice(&bytes);
        behind.fill(0);
        Some(Ok(()))
    }

    fn read(&self, offset: u64, len: u32, _deadline: Duration) -> BoxFuture<'static, Result<Bytes, FetchError>> {
        let bytes = self.bytes(offset, len as usize);
        async move { Ok(bytes) }.boxed()
    }

    fn present_bytes(&self) -> u64 {
        self.data.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(errno: i32) -> CallError {
        SysError::new("fsopen", Path::new("/x"), io::Error::from_raw_os_error(errno)).into()
    }

    #[test]
    fn a_person_understands_why() {
        for (errno, word) in [
            (libc::ENODEV, "CONFIG_EROFS_FS)"),
            (libc::ENOTBLK, "6.12"),
            (libc::EPERM, "CAP_SYS_ADMIN"),
            (libc::ENOSYS, "5.2"),
            (libc::EIO, "Input/output error"),
        ] {
            let reason = explain(&failed(errno));
            assert!(reason.contains(word) && reason.contains("fsopen"), "{reason}");
        }
        let reason = explain(&CallError::Late(Duration::from_secs(5)));
        assert!(reason.contains("within 5 s"), "{reason}");
    }

    #[test]
    fn reads_are_joined_where_the_kernel_can() {
        for release in [
            "6.12.29",
            "6.12.48+deb13-amd64",
            "6.14.7",
            "6.18.4-fc",
            "6.15",
            "7.0.1",
            "10.1.0",
        ] {
            assert_eq!(addressing(release), Addressing::Chunks, "{release}");
        }
        for release in [
            "6.12.28",
            "6.12.0-55.el10.x86_64",
            "6.13.12",
            "6.14.0-23-generic",
            "6.14.6",
            "5.15.200",
            "",
            "x.y",
        ] {
            assert_eq!(addressing(release), Addressing::Unified, "{release}");
        }
    }

    #[test]
    fn the_layer_is_what_its_index_says() {
        let probe = Probe::new().unwrap();
        let file = probe.index.inode(probe.index.lookup_path(NAME).unwrap()).unwrap();
        let mut bytes = vec![1; file.size as usize];
        probe.read_ready(file.data, &mut bytes).unwrap().unwrap();
        assert!(bytes.starts_with(CONTENT) && bytes.len() == FILE_SIZE);
        let mut tail = [1; 8];
        probe.read_ready(DATA_SIZE as u64 - 4, &mut tail).unwrap().unwrap();
        assert_eq!((&tail[..4], &tail[4..]), (&content()[DATA_SIZE - 4..], &[0; 4][..]));
        probe.read_ready(u64::MAX, &mut tail).unwrap().unwrap();
    }
}
