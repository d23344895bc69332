//! Java: the parts of a runtime that every program needs.

use super::program::Library;
use super::{Step, Walk};
use crate::layer::entry::view::{File, parent};

/// Bytes of the runtime's file of classes that are read first: its header and index.
const INDEX: u64 = 1 << 20;

/// Files of a runtime, below its home.
const LIBRARIES: [&str; 6] = [
    "lib/server/libjvm.so",
    "lib/libjli.so",
    "lib/libjava.so",
    "lib/libjimage.so",
    "lib/libzip.so",
    "lib/libverify.so",
];
const FILES: [&str; 2] = ["lib/jvm.cfg", "conf/security/java.security"];
/// Classes as they are in memory, for all programs: mapped as a whole, and changed where it was not mapped as it was made.
const ARCHIVE: &str = "lib/server/classes.jsa";
/// Largest archive that is wished for: that of a runtime has 13 MB.
const ARCHIVE_MOST: u64 = 32 << 20;
const TIME_ZONE: &str = "/etc/localtime";

impl Walk {
    /// The runtime whose launcher this is.
    pub(super) fn java(&self, file: &File) -> Vec<Step> {
        let home = parent(parent(&file.path)).to_owned();
        if let Some(classes) = self.find(&format!("{home}/lib/modules")) {
            self.wish(&classes, 0..INDEX);
        }
        if let Some(archive) = self.find(&format!("{home}/{ARCHIVE}")) {
            self.wish(&archive, 0..ARCHIVE_MOST);
        }
        let libraries = LIBRARIES.map(|name| {
            Step::Library(Library {
                name: format!("{home}/{name}"),
                own: Vec::new(),
                near: Vec::new(),
                machine: (0, true),
                is_musl: false,
            })
        });
        let files = FILES.map(|name| Step::File(format!("{home}/{name}")));
        let more = std::iter::once(Step::File(TIME_ZONE.to_owned()));
        libraries.into_iter().chain(files).chain(more).collect()
    }
}
