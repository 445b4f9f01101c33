//! The allocator of the program, and when it gives memory back to the system.
//!
//! A call makes and drops hundreds of small pieces, on whichever thread it is just then:
//! the allocator of the C library takes a fifth of a call's time for that, mimalloc does
//! not. Left to itself, mimalloc gives memory back in whichever call allocates just then,
//! milliseconds for each 32 MiB, and now and then that one holds the lock of the memory
//! store, for which every call waits. So it is told to wait for a thread that does
//! nothing else.

use std::{ffi::c_long, io, thread, time::Duration};

use libmimalloc_sys::{mi_collect, mi_option_set, mi_option_t};
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// `mi_option_purge_delay` of mimalloc 3, which the crate does not name: the milliseconds
/// after which freed memory is given back by whoever allocates next.
pub(crate) const PURGE_DELAY: mi_option_t = 15;
pub(crate) const NEVER: c_long = i32::MAX as c_long;
/// So long freed memory is kept, at most: what is used again before costs nothing.
const KEPT: Duration = Duration::from_secs(5);

/// From now on, freed memory is given back by a thread of its own.
///
/// # Errors
///
/// When the thread cannot be started; memory is then given back as before.
pub(crate) fn give_back_apart() -> io::Result<()> {
    thread::Builder::new()
        .name("give-back".to_owned())
        .spawn(|| {
            set_purge_delay(NEVER);
            loop {
                thread::sleep(KEPT);
                give_back();
            }
        })
        .map(drop)
}

#[expect(unsafe_code, reason = "a call of C that sets a number")]
pub(crate) fn set_purge_delay(milliseconds: c_long) {
    // SAFETY: mimalloc takes any number for any option, from any thread.
    unsafe { mi_option_set(PURGE_DELAY, milliseconds) }
}

#[expect(unsafe_code, reason = "a call of C without arguments that matter")]
pub(crate) fn give_back() {
    // SAFETY: it touches only what is free, and may be called from any thread.
    unsafe { mi_collect(true) }
}
