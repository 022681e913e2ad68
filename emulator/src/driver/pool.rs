//! Memory pools, from which cuMemAllocAsync allocates.
//!
//! A pool here is only an account. Memory is allocated and freed at once; what a real pool would retain counts as
//! reserved until a synchronisation finds it above the release threshold, or until the pool is trimmed.
//!
//! Not here: sharing between processes and access from other devices.

use super::call::{Answer, exports, give, refuse};
use super::codes::Code;
use super::handles;
use super::state::{self, Device, Handle, current, driver};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex};

pub struct Pool {
    pub handle: usize,
    pub device: c_int,
    /// The device's own pool, which a program cannot destroy.
    is_default: bool,
    /// Maximum bytes in use; 0 for no limit of its own.
    most: u64,
    account: Mutex<Account>,
}

#[derive(Default)]
struct Account {
    used: u64,
    used_high: u64,
    reserved: u64,
    reserved_high: u64,
    threshold: u64,
    reuse: [c_int; 3],
}

impl Pool {
    pub fn new(device: c_int, is_default: bool) -> Arc<Pool> {
        Pool::limited(device, is_default, 0)
    }

    fn limited(device: c_int, is_default: bool, most: u64) -> Arc<Pool> {
        Arc::new(Pool {
            handle: handles::fresh(),
            device,
            is_default,
            most,
            account: Mutex::new(Account { reuse: [1; 3], ..Account::default() }),
        })
    }

    /// Accounts for an allocation; refuses one beyond the pool's own limit.
    pub fn take(&self, bytes: u64) -> Answer {
        let mut account = self.account.lock().unwrap();
        let most = if self.most == 0 { u64::MAX } else { self.most };
        if bytes > most - account.used {
            let used = account.used;
            return refuse(
                Code::OUT_OF_MEMORY,
                format!("{bytes} bytes were asked of a memory pool limited to {most}, of which {used} are used"),
            );
        }
        account.used += bytes;
        account.used_high = account.used_high.max(account.used);
        account.reserved = account.reserved.max(account.used);
        account.reserved_high = account.reserved_high.max(account.reserved);
        Ok(())
    }

    /// Accounts for a free: the memory stays reserved.
    pub fn give_back(&self, bytes: u64) {
        self.account.lock().unwrap().used -= bytes;
    }

    /// Bytes reserved but not in use.
    fn kept(&self) -> u64 {
        let account = self.account.lock().unwrap();
        account.reserved - account.used
    }

    fn trim(&self, least: u64) {
        let mut account = self.account.lock().unwrap();
        account.reserved = account.reserved.min(account.used.max(least));
    }
}

/// Bytes that a device's pools retain unused.
pub fn kept_by_pools(device: &Device) -> u64 {
    let Ok(driver) = driver() else { return 0 };
    let pools = driver.pools.all();
    let own = pools.iter().filter(|pool| pool.device == device.ordinal);
    own.map(|pool| pool.kept()).sum()
}

/// Called by every synchronisation: pools release what they retain beyond their threshold.
pub fn trim_at_synchronisation(device: &Device) {
    let Ok(driver) = driver() else { return };
    for pool in driver.pools.all() {
        if pool.device == device.ordinal {
            let threshold = pool.account.lock().unwrap().threshold;
            pool.trim(threshold);
        }
    }
}

/// Makes every pool of the device release all it retains, as a driver does before it reports out of memory.
pub fn trim_all(device: &Device) {
    let Ok(driver) = driver() else { return };
    for pool in driver.pools.all() {
        if pool.device == device.ordinal {
            pool.trim(0);
        }
    }
}

/// CUmemPoolProps.
#[repr(C)]
pub struct Properties {
    allocation_type: c_int,
    handle_types: c_int,
    location_type: c_int,
    location_id: c_int,
    security_attributes: *mut c_void,
    max_size: usize,
    usage: u16,
    reserved: [u8; 54],
}

/// CUmemLocation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    pub kind: c_int,
    pub id: c_int,
}

/// CUmemAccessDesc.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AccessDescription {
    location: Location,
    flags: c_int,
}

pub const LOCATION_DEVICE: c_int = 1;
const PINNED: c_int = 1;
const READ_WRITE: c_int = 3;

/// The pool attributes by number; 1 to 3 are ints, the others 64-bit numbers.
const REUSE_FIRST: c_int = 1;
const REUSE_LAST: c_int = 3;
const RELEASE_THRESHOLD: c_int = 4;
const RESERVED_CURRENT: c_int = 5;
const RESERVED_HIGH: c_int = 6;
const USED_CURRENT: c_int = 7;
const USED_HIGH: c_int = 8;

exports! { POOL:
    fn cuDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) {
        give(pool, state::device(device)?.default_pool.handle as Handle, "the pool")
    }

    fn cuDeviceGetMemPool(pool: *mut Handle, device: c_int) {
        give(pool, state::device(device)?.pool.lock().unwrap().handle as Handle, "the pool")
    }

    fn cuDeviceSetMemPool(device: c_int, pool: Handle) {
        let device = state::device(device)?;
        let pool = driver()?.pools.get(pool)?;
        if pool.device != device.ordinal {
            let why = format!("the pool belongs to device {}, not {}", pool.device, device.ordinal);
            return refuse(Code::INVALID_VALUE, why);
        }
        *device.pool.lock().unwrap() = pool;
        Ok(())
    }

    fn cuMemPoolCreate(pool: *mut Handle, properties: *const Properties) {
        if properties.is_null() {
            return refuse(Code::INVALID_VALUE, "the pointer for the properties is null");
        }
        let properties = &*properties;
        if properties.allocation_type != PINNED {
            let why = format!("the allocation type must be 1 (pinned), not {}", properties.allocation_type);
            return refuse(Code::INVALID_VALUE, why);
        }
        if properties.handle_types != 0 {
            return refuse(Code::NOT_SUPPORTED, "pools shared between processes are not emulated");
        }
        if properties.location_type != LOCATION_DEVICE {
            let kind = properties.location_type;
            let why = format!("pools are emulated on devices only (location type 1), not type {kind}");
            return refuse(Code::NOT_SUPPORTED, why);
        }
        state::device(properties.location_id)?;
        let made = Pool::limited(properties.location_id, false, properties.max_size as u64);
        give(pool, driver()?.pools.insert(made.handle, made), "the pool")
    }

    fn cuMemPoolDestroy(pool: Handle) {
        let driver = driver()?;
        let found = driver.pools.get(pool)?;
        if found.is_default {
            return refuse(Code::INVALID_VALUE, "the default pool of a device cannot be destroyed");
        }
        let device = state::device(found.device)?;
        let mut current = device.pool.lock().unwrap();
        if current.handle == found.handle {
            *current = device.default_pool.clone();
        }
        driver.pools.remove(pool).map(|_| ())
    }

    fn cuMemPoolTrimTo(pool: Handle, least: usize) {
        driver()?.pools.get(pool)?.trim(least as u64);
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) {
        let pool = driver()?.pools.get(pool)?;
        let account = pool.account.lock().unwrap();
        let number = match attribute {
            REUSE_FIRST..=REUSE_LAST => {
                return give(value.cast::<c_int>(), account.reuse[(attribute - 1) as usize], "the value");
            }
            RELEASE_THRESHOLD => account.threshold,
            RESERVED_CURRENT => account.reserved,
            RESERVED_HIGH => account.reserved_high,
            USED_CURRENT => account.used,
            USED_HIGH => account.used_high,
            _ => return refuse(Code::INVALID_VALUE, format!("pool attribute {attribute} is not known")),
        };
        give(value.cast::<u64>(), number, "the value")
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) {
        let pool = driver()?.pools.get(pool)?;
        if value.is_null() {
            return refuse(Code::INVALID_VALUE, "the pointer for the value is null");
        }
        let mut account = pool.account.lock().unwrap();
        match attribute {
            REUSE_FIRST..=REUSE_LAST => {
                account.reuse[(attribute - 1) as usize] = value.cast::<c_int>().read_unaligned();
            }
            RELEASE_THRESHOLD => account.threshold = value.cast::<u64>().read_unaligned(),
            RESERVED_HIGH | USED_HIGH => {
                if value.cast::<u64>().read_unaligned() != 0 {
                    return refuse(Code::INVALID_VALUE, "a high-water mark can only be set to 0");
                }
                match attribute {
                    RESERVED_HIGH => account.reserved_high = account.reserved,
                    _ => account.used_high = account.used,
                }
            }
            _ => return refuse(Code::INVALID_VALUE, format!("pool attribute {attribute} cannot be set")),
        }
        Ok(())
    }

    fn cuMemPoolSetAccess(pool: Handle, map: *const AccessDescription, count: usize) {
        let pool = driver()?.pools.get(pool)?;
        for at in 0..count {
            let description = map.add(at).read_unaligned();
            let own = description.location.kind == LOCATION_DEVICE && description.location.id == pool.device;
            if !own || description.flags != READ_WRITE {
                return refuse(Code::NOT_SUPPORTED, "memory of a pool is accessible from its own device only");
            }
        }
        Ok(())
    }

    fn cuMemPoolGetAccess(flags: *mut c_int, pool: Handle, location: *const Location) {
        let pool = driver()?.pools.get(pool)?;
        if location.is_null() {
            return refuse(Code::INVALID_VALUE, "the pointer for the location is null");
        }
        let location = location.read_unaligned();
        let own = location.kind == LOCATION_DEVICE && location.id == pool.device;
        give(flags, if own { READ_WRITE } else { 0 }, "the flags")
    }

    fn cuDeviceGraphMemTrim(device: c_int) {
        state::device(device).map(|_| ())
    }

    fn cuDeviceGetGraphMemAttribute(device: c_int, attribute: c_int, value: *mut c_void) {
        let device = state::device(device)?;
        if !(0..=3).contains(&attribute) {
            return refuse(Code::INVALID_VALUE, format!("graph memory attribute {attribute} is not known"));
        }
        current()?;
        let allocations = device.allocations.lock().unwrap();
        let of_graphs = allocations.values().filter(|owned| matches!(owned.kind, state::Kind::Graph(_)));
        give(value.cast::<u64>(), of_graphs.map(|owned| owned.bytes).sum(), "the value")
    }
}
