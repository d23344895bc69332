//! EROFS images as others see them: an independent reader, the kernel, and `fsck.erofs`.
//!
//! Tests that mount need root and a kernel that mounts EROFS from files (6.12 with `CONFIG_EROFS_FS_BACKED_BY_FILE`), and say so
//! where they cannot. `LAZULI_FSCK_EROFS` names a `fsck.erofs` of erofs-utils 1.8 or newer, which then checks every image.

mod kernel;
mod pure;
mod reader;
#[allow(dead_code)]
#[path = "../support/skip.rs"]
mod skip;
mod trees;
