//! Host memory that a program allocated itself and registers (`cuMemHostRegister`).
//!
//! Kernels cannot access it directly as they can other memory. A kernel sees a mirror at another address, which devices
//! announce by CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM. A mirror is created when a program asks for
//! its address, filled before every launch on its device, and written back afterwards. Copies and fills access the host
//! memory itself.
//!
//! Not here: memory of other devices (IOMEMORY).

use super::call::{Answer, exports, give, refuse};
use super::codes::Code;
use super::state::{self, Device, DevicePointer, Kind, Owned, current, driver};
use super::work::from_memory;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};

/// A range of host memory.
pub struct Registered {
    pub bytes: u64,
    pub flags: c_uint,
    pub context: usize,
    /// Address of the mirror on each device, by ordinal.
    mirrors: BTreeMap<c_int, DevicePointer>,
}

/// Held by a launch that uses mirrors, and while mirrors are removed.
static TURN: Mutex<()> = Mutex::new(());

const PORTABLE: c_uint = 1;
const DEVICE_MAP: c_uint = 2;
const READ_ONLY: c_uint = 8;

fn register(pointer: *mut c_void, bytes: usize, flags: c_uint) -> Answer {
    let context = current()?;
    super::graph::refuse_unsafe_call()?;
    if pointer.is_null() || bytes == 0 {
        return refuse(Code::INVALID_VALUE, format!("{bytes} bytes at {pointer:p} cannot be registered"));
    }
    if flags & !(PORTABLE | DEVICE_MAP | READ_ONLY) != 0 {
        return refuse(
            Code::NOT_SUPPORTED,
            format!("flags {flags:#x} are not emulated: portable 1, device map 2, read only 8"),
        );
    }
    let (first, bytes) = (pointer as u64, bytes as u64);
    let Some(last) = first.checked_add(bytes - 1) else {
        return refuse(Code::INVALID_VALUE, format!("{bytes} bytes at {first:#x} do not end inside the address space"));
    };
    let mut registered = driver()?.registered.lock().unwrap();
    let before = registered.range(..=last).next_back();
    let overlap = before.is_some_and(|(&at, other)| at >= first || first - at < other.bytes);
    if overlap || state::device_of(first).is_some() || state::device_of(last).is_some() {
        return refuse(
            Code::HOST_MEMORY_ALREADY_REGISTERED,
            format!("{bytes} bytes at {first:#x} overlap memory that is registered or was allocated by the driver"),
        );
    }
    registered.insert(first, Registered { bytes, flags, context: context.handle, mirrors: BTreeMap::new() });
    Ok(())
}

fn unregister(pointer: *mut c_void) -> Answer {
    let context = current()?;
    super::graph::refuse_unsafe_call()?;
    super::stream::settle_all(&context)?;
    super::order::host_waited_for_all(&context)?;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let removed = driver()?.registered.lock().unwrap().remove(&(pointer as u64));
    match removed {
        Some(removed) => free_mirrors(&removed),
        None => {
            refuse(Code::HOST_MEMORY_NOT_REGISTERED, format!("{pointer:p} is not the start of registered host memory"))
        }
    }
}

fn free_mirrors(removed: &Registered) -> Answer {
    for (&ordinal, &mirror) in &removed.mirrors {
        let device = state::device(ordinal)?;
        device.allocations.lock().unwrap().remove(&mirror);
        device.memory.free(mirror).map_err(from_memory)?;
    }
    Ok(())
}

/// Forgets the ranges registered by a context that ends. Returns how many.
pub fn forget_context(context: usize) -> Answer<usize> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut registered = driver()?.registered.lock().unwrap();
    let own: Vec<u64> = registered.iter().filter(|(_, range)| range.context == context).map(|(&at, _)| at).collect();
    for at in &own {
        if let Some(removed) = registered.remove(at) {
            free_mirrors(&removed)?;
        }
    }
    Ok(own.len())
}

/// Registered memory that contains `address`: (first byte, size, flags, context).
pub fn find(address: u64) -> Answer<Option<(u64, u64, c_uint, usize)>> {
    let registered = driver()?.registered.lock().unwrap();
    let before = registered.range(..=address).next_back();
    Ok(before
        .filter(|(first, range)| address - **first < range.bytes)
        .map(|(&first, range)| (first, range.bytes, range.flags, range.context)))
}

/// Address at which kernels on the current device see registered host memory; None if it is not registered.
pub fn mirror(address: u64) -> Answer<Option<DevicePointer>> {
    let context = current()?;
    let device = context.device()?;
    let mut registered = driver()?.registered.lock().unwrap();
    let before = registered.range_mut(..=address).next_back();
    let Some((&first, range)) = before.filter(|(first, range)| address - **first < range.bytes) else {
        return Ok(None);
    };
    if let Some(mirror) = range.mirrors.get(&device.ordinal) {
        return Ok(Some(mirror + (address - first)));
    }
    let Some(mirror) = device.memory.alloc_host(range.bytes) else {
        return refuse(Code::OUT_OF_MEMORY, format!("no address space for {} bytes of host memory", range.bytes));
    };
    let owned =
        Owned { bytes: range.bytes, kind: Kind::Mirror(first), context: range.context, made_by: "cuMemHostRegister" };
    device.allocations.lock().unwrap().insert(mirror, owned);
    range.mirrors.insert(device.ordinal, mirror);
    Ok(Some(mirror + (address - first)))
}

/// The host memory behind `bytes` bytes of a mirror.
pub fn behind(address: DevicePointer, bytes: usize) -> Option<usize> {
    match state::device_of(address) {
        Some((_, first, Owned { kind: Kind::Mirror(host), bytes: all, .. }))
            if bytes as u64 <= all - (address - first) =>
        {
            Some((host + (address - first)) as usize)
        }
        _ => None,
    }
}

/// To write back after a launch: (host memory, mirror, contents of the mirror before).
type Filled = Vec<(u64, DevicePointer, Vec<u8>)>;

/// Runs a launch with the mirrors on its device filled from the host, and writes back the bytes that the launch
/// changed. Only those, since the host may have written others meanwhile. Launches with mirrors run one after the
/// other.
pub fn with_mirrors<T>(device: &Device, launch: impl FnOnce() -> T) -> Answer<T> {
    let mirrors = || -> Answer<Vec<(u64, DevicePointer, u64)>> {
        let registered = driver()?.registered.lock().unwrap();
        let mirror = |range: &Registered| range.mirrors.get(&device.ordinal).copied();
        Ok(registered.iter().filter_map(|(&host, range)| Some((host, mirror(range)?, range.bytes))).collect())
    };
    if mirrors()?.is_empty() {
        return Ok(launch());
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mirrors = mirrors()?;
    let mut filled = Filled::new();
    for (host, mirror, bytes) in mirrors {
        // SAFETY: a program keeps memory allocated while it is registered, as the manual demands.
        let before = unsafe { std::slice::from_raw_parts(host as *const u8, bytes as usize) }.to_vec();
        device.memory.copy_in(mirror, &before).map_err(from_memory)?;
        filled.push((host, mirror, before));
    }
    let launched = launch();
    for (host, mirror, before) in filled {
        let mut after = vec![0; before.len()];
        device.memory.copy_out(mirror, &mut after).map_err(from_memory)?;
        for at in (0..after.len()).filter(|&at| after[at] != before[at]) {
            // SAFETY: as above. A byte that changed was written by a kernel, so the program treats it as writable.
            unsafe { ((host as usize + at) as *mut u8).write(after[at]) };
        }
    }
    Ok(launched)
}

exports! { REGISTERED:
    fn cuMemHostRegister(pointer: *mut c_void, bytes: usize, flags: c_uint) {
        register(pointer, bytes, flags)
    }

    fn cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, flags: c_uint) {
        register(pointer, bytes, flags)
    }

    fn cuMemHostUnregister(pointer: *mut c_void) {
        unregister(pointer)
    }

    fn cuMemHostGetDevicePointer_v2(address: *mut DevicePointer, pointer: *mut c_void, flags: c_uint) {
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        match state::device_of(pointer as u64) {
            Some((_, _, owned)) if matches!(owned.kind, Kind::Host(_)) => give(address, pointer as u64, "the address"),
            _ => match mirror(pointer as u64)? {
                Some(mirror) => give(address, mirror, "the address"),
                None => refuse(Code::INVALID_VALUE, format!("{pointer:p} is not pinned host memory")),
            },
        }
    }

    fn cuMemHostGetFlags(flags: *mut c_uint, pointer: *mut c_void) {
        match state::device_of(pointer as u64) {
            Some((_, _, Owned { kind: Kind::Host(own), .. })) => give(flags, own, "the flags"),
            _ => match find(pointer as u64)? {
                Some((_, _, own, _)) => give(flags, own, "the flags"),
                None => refuse(Code::INVALID_VALUE, format!("{pointer:p} is not pinned host memory")),
            },
        }
    }
}
