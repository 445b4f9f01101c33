-- Shared by all scripts: this text stands in front of each of them.
-- Every script touches one key, checks and acts in one step, and returns
-- errors as data, so that they look alike on every version of Redis. A reply
-- is an array {status, now, ...}; `now` is the time of this server in
-- microseconds, from which the client learns its clock. These statuses are
-- common:
--
--   late          now is past the deadline; nothing was done
--   foreign       another type lives at the key
--   unreadable    {…, document}: its version cannot be told
--   out_of_range  {…, version}: it is beyond 2^53, where numbers are not exact
--   unknown       an earlier attempt may have been executed; nothing was done
--   failed        {…, error}: Redis refused a command

local MAX_RAISABLE = '9007199254740992' -- 2^53

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function reply(status, ...)
  return {status, string.format('%.0f', now), ...}
end

-- Compares whole numbers as text: Lua would round what is beyond 2^53.
local function beyond(digits, bound)
  if #digits ~= #bound then return #digits > #bound end
  return digits > bound
end

-- The version of a document whose tail is not the usual one, from all of it.
local function version_of_whole(document)
  local readable, value = pcall(cjson.decode, document)
  if not readable or type(value) ~= 'table' then return nil end
  if type(value.key) ~= 'string' or type(value.metadata) ~= 'table' then return nil end
  local version = value.version
  if version == nil or version == cjson.null then return '0' end
  if type(version) ~= 'number' or version < 0 or version % 1 ~= 0 then return nil end
  -- cjson has rounded it already, 2^53 + 1 to 2^53; any greater number says "beyond".
  if version >= tonumber(MAX_RAISABLE) then return '9007199254740993', true end
  return string.format('%.0f', version)
end

-- What is stored at the key: nil and an error, or a table with
--   exists    whether anything is
--   version   digits; nil when the document is unreadable
--   inexact   true when `version` is not exact but beyond 2^53
--   write_id  of the call that wrote it, if it says so
local function look_up(key)
  local tail = redis.pcall('GETRANGE', key, -160, -1)
  if type(tail) == 'table' then return nil, tail.err end
  if tail == '' and redis.call('EXISTS', key) == 0 then return {exists = false} end
  local found = {exists = true}
  -- The last brace closes the document, so this is its outer version.
  found.version = string.match(tail, '[{,]"version":(%d+)}$')
  if found.version then
    found.write_id = string.match(tail, '"write_id":"([^"\\]*)","version":%d+},"version":%d+}$')
  else
    found.version, found.inexact = version_of_whole(redis.call('GET', key))
  end
  if found.version == '0' then found.version = '1' end
  return found
end

-- What a refused command comes to. After a lost attempt, which may have been
-- executed before another type came to lie at the key, nothing is sure.
local function refuse(err, lost_since)
  if not string.find(err, 'WRONGTYPE', 1, true) then return reply('failed', err) end
  return reply(lost_since ~= '' and 'unknown' or 'foreign')
end
